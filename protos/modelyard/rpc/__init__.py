"""What everyone who speaks the contract shares: reasons and statuses, server kit, channels, validation."""
