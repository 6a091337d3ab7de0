"""Stage engines: what runs in a stage's process, and the messages between it and the driver."""
