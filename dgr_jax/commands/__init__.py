"""The programs, one file each: flags, inputs, and a call of the library."""
