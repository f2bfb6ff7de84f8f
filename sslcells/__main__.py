"""`python -m sslcells <command>`, and `accelerate launch -m sslcells <command>`."""

from sslcells.cli import main

raise SystemExit(main())
