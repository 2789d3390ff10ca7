"""What this computer can do: memory, width, time, processes."""
