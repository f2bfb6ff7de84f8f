"""Many runs at a glance: what each folder says of its run, on the console and as a page. It only reads."""
