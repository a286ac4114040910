"""What each rank owns, and which block of which tensor fills each shard, as pure data."""
