"""Which data of a stream are kept, and in which roles."""
