"""Where jobs live until they expire. ``base`` says what a store promises; each backend is a module."""
