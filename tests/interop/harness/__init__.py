"""What the tests stand on: processes, the broker, the binary, links that can be cut, clients."""
