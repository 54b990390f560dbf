"""s3dcp's tests; a package, so that rank processes can import what they are sent by name."""
