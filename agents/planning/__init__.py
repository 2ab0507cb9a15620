"""What a run will cost, before it starts: a resolved configuration comes in, sizes, operations and times go out."""
