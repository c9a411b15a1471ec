"""What the README claims, measured. A package, since fairscale installs one of this name too."""
