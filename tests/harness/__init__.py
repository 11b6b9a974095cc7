"""What tests share: programs as child processes, and small waits for conditions."""
