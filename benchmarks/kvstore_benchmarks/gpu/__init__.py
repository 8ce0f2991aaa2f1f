"""`kvstore bench gpu`: copies between a GPU and slots, against plain pinned ones."""
