"""The protocol of the Redis tier as a model, and a checker that explores all its states."""
