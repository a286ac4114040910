"""What each rank owns and which block of which tensor fills it, as pure data."""
