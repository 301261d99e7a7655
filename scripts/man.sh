#!/bin/sh
# man.sh BIN DIR: manual pages and completion scripts of every program in BIN, as packages install them. What is root's to
# run is in section 8.
set -eu
bin=$1
dir=$2
mkdir -p "$dir/man1" "$dir/man8" "$dir/bash" "$dir/zsh" "$dir/fish"
for program in ursa ursa-control ursa-agent ursa-shim ursa-init ursa-cni; do
    pages=$dir/pages
    rm -rf "$pages"
    mkdir "$pages"
    "$bin/$program" man "$pages"
    for page in "$pages"/*; do
        name=$(basename "$page" .1)
        if [ "$program" = ursa ]; then
            mv "$page" "$dir/man1/"
        else
            sed -E 's/^(\.TH [^ ]+) 1 /\1 8 /; s/^(ursa\\-[a-z\\-]+)\(1\)/\1(8)/' "$page" >"$dir/man8/$name.8"
        fi
    done
    rm -rf "$pages"
    "$bin/$program" completion bash >"$dir/bash/$program"
    "$bin/$program" completion zsh >"$dir/zsh/_$program"
    "$bin/$program" completion fish >"$dir/fish/$program.fish"
done
# Its own page tells of the runtime's calls, too.
cp cni-plugin/ursa-cni.8 "$dir/man8/"
