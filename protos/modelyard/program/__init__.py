"""What modelyard's server programs share beside the contract: settings, logging, process life."""
