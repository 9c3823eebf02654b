"""The tests' tools: processes, the broker, the binary, links that can be cut, clients."""
