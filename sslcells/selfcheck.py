"""The former name of `sslcells.doctor`, for scripts that have it."""

from sslcells import commandline
from sslcells.doctor import command

if __name__ == "__main__":
    raise SystemExit(commandline.run("doctor", command))
