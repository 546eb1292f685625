"""What every room stands on: errors, storage, statistics, pictures."""
