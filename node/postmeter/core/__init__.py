"""The pure core: no event loop, no clock, no randomness, no files. Time comes in as an argument, in milliseconds."""
