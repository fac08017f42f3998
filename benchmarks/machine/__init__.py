"""What a machine is and what it does at best."""
