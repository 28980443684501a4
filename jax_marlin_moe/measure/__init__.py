"""Device times of layers: named sizes, random layers and routings, replays, and the search for the fastest scheme."""
