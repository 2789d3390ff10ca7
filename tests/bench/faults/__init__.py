"""What a run and the verbs on it survive: kills, full disks, damaged files, streams that go."""
