#!/usr/bin/env bash
# Make dalle/bundled/ from nothing: the art set, scenes, tokens, decoder, transformer, CLIP, and the model folder.
#
#   benchmarks/release.sh [STAGE...]     data, tokens, decoder, transformer, clip, bundle; all of them if none is named
#
# Each stage is one command that goes on where it was stopped; what is finished is kept. DALLE_RUNS is where everything
# lies (default ~/.cache/dalle-runs/release), DALLE a command that starts dalle. The stages use folders of their own, so that a
# later one can be settled anew without its forerunners.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
runs=${DALLE_RUNS:-$HOME/.cache/dalle-runs/release}
dalle=${DALLE:-$here/../.venv/bin/dalle}
python=$(dirname "${dalle%% *}")/python
recipe=$here/release/bundled.toml
mkdir -p "$runs"

data() {
    [ -e "$runs/art/metadata.jsonl" ] || $dalle data emoji --out "$runs/art"
    [ -e "$runs/scenes/metadata.jsonl" ] || $dalle data scenes "$runs/art" --out "$runs/scenes" --n 40000
}

# An epoch sees three scenes in ten, beside the art set's pictures.
train() { # FOLDER OPTION...
    local folder=$1
    shift
    $dalle train "$runs/art" "$runs/scenes" --weight 1,0.3 --preset "$recipe" --out "$runs/$folder" "$@"
}

# The encoder and codes, with a decoder of the encoder's size that is thrown away.
tokens() {
    train tokens --stages tokenizer,dvae --set decoder_training=none --set dvae.output_size=64 \
        --set 'dvae.decoder_widths=[]' --set dvae.decoder_blocks=none
}
decoder() { train decoder --stages decoder --init-from "$runs/tokens"; }
transformer() { train transformer --stages transformer --init-from "$runs/decoder"; }
clip() { train clip --stages clip --init-from "$runs/transformer"; }
bundle() { "$python" "$here/bundle.py" "$runs/clip" "$runs/art" "$runs/scenes" --hours "${HOURS:?say in HOURS what it was trained on, and how long}"; }

for stage in "${@:-all}"; do
    case $stage in
    all) for each in data tokens decoder transformer clip bundle; do $each; done ;;
    data | tokens | decoder | transformer | clip | bundle) $stage ;;
    *) echo "stage $stage is unknown: data, tokens, decoder, transformer, clip, bundle" >&2; exit 2 ;;
    esac
done
