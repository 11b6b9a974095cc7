"""What the OpenAI-compatible gateway and the engines that speak OpenAI's API share: the wire types."""
