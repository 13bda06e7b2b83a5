"""What mask providers share."""
