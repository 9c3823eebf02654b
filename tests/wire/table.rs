use tidegate::mqtt as _;
