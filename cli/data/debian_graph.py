#!/usr/bin/env python3
"""Makes the graph of a Debian release's package dependencies, as an adjacency list that is compressed with gzip.

    /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_debian_dists_bookworm_main_binary-amd64_Packages* |
        python3 debian_graph.py "Debian 12.14 (bookworm), main, amd64, released 16 May 2026" > debian-12-depends.adjlist.gz

The input is the release's index of packages (dists/bookworm/main/binary-amd64/Packages), unpacked. A line of the output is a package and, behind it, all that it names in Pre-Depends and
Depends, alternatives too, without versions and architectures; or a virtual package and all packages that provide it. Lines that begin with # are comments. networkx.read_adjlist reads it.
"""

import gzip
import re
import sys


def names(field):
    """The names in a field such as "libc6 (>= 2.34), exim4 | mail-transport-agent"."""
    parts = re.split(r"[,|]", re.sub(r"\([^)]*\)", "", field))
    return [part.strip().split(":")[0] for part in parts if part.strip()]


def stanzas(lines):
    """The fields of each package; lines that begin with a blank go on with the field before."""
    fields, last = {}, None
    for line in lines:
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, None
        elif line[0].isspace():
            fields[last] += line
        else:
            last, value = line.split(":", 1)
            fields[last] = value
    if fields:
        yield fields


def main():
    edges, packages, provided = {}, set(), {}
    for fields in stanzas(sys.stdin):
        package = fields["Package"].strip()
        packages.add(package)
        to = edges.setdefault(package, set())
        for field in ("Pre-Depends", "Depends"):
            to.update(names(fields.get(field, "")))
        for name in names(fields.get("Provides", "")):
            provided.setdefault(name, set()).add(package)
    for virtual, providers in provided.items():
        # What is a package too stays one: its providers only stand in for it.
        if virtual not in packages:
            edges[virtual] = providers
    count = sum(len(to - {node}) for node, to in edges.items())
    lines = [
        f"# Package dependencies of {sys.argv[1]}.",
        "# Each line: a package and what it depends on, or a virtual package and what provides it.",
        f"# {len(edges)} lines, {count} edges.",
    ]
    lines += [" ".join([node, *sorted(to - {node})]) for node, to in sorted(edges.items())]
    text = "".join(line + "\n" for line in lines).encode("ascii")
    # Without a time and a name, so that the same input makes the same file.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=sys.stdout.buffer, mtime=0) as file:
        file.write(text)


if __name__ == "__main__":
    main()
