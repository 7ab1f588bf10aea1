"""Many runs in one directory, trained by any number of workers that share it."""
