"""Which model or agent fits a task, and which agent is to do it. Pure; see README.md."""
