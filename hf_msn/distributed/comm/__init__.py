"""Communication between ranks: collectives with a deadline, messages in the background, and the wire format."""
