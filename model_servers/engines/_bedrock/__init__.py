"""Parts of the bedrock engine that need botocore, which is imported only when an engine is made."""
