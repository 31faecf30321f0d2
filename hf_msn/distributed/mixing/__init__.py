"""The parts of the gossip methods: mass, momentum and consensus under mixing, and who is there to mix with."""
