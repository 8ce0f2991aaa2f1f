"""The server: gRPC, the attach socket and the admin port over one `kvstore.store.Store`."""
