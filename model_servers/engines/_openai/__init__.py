"""What the engines that speak OpenAI's HTTP API share: requests, answers, errors, connections, health."""
