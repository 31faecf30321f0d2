"""The parts of [`Codistillation`]: what replicas compare, exchange, and keep of one another."""
