"""What a config needs of a machine that is not at hand: memory, traffic and time of a step."""
