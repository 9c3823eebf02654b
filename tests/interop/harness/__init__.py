"""What the tests stand on: processes, the core, the binary, links that can be cut, clients."""
