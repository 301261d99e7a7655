//! What the help of each command ends with.

/// Of the program itself.
pub(crate) const ALL: &str = "\
Examples:
  ursa get meshes
  ursa apply -f policy.yaml
  ursa inspect dataplanes
  ursa ticket create --workload web

Which control plane: --socket, else the context (see `ursa config`), else /run/ursa/control.sock
where it exists (root and the control plane's own user need no token there), else
http://localhost:5681.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage.";

pub(crate) const APPLY: &str = "\
Examples:
  ursa apply -f policy.yaml
  ursa apply -f policies/                           # its *.yaml, *.yml and *.json, by name
  ursa apply -f https://example.com/policy.yaml
  echo 'type: Mesh
  name: demo' | ursa apply -f -
  ursa apply -f dataplane.yaml -v name=web -v address=10.0.0.7 --dry-run

All documents are read and checked before the first write. The first one that the control plane
refuses ends the command with exit code 1; what was written before it stays, and what comes after
it isn't tried.";

pub(crate) fn get() -> String {
    let mut types: Vec<&str> = ursa_model::registry().iter().map(|descriptor| descriptor.path).collect();
    types.sort_unstable();
    format!("{GET}\n\nTypes: {}", types.join(", "))
}

const GET: &str = "\
Examples:
  ursa get meshes
  ursa get meshtimeouts --mesh default              # or `ursa get mt`
  ursa get meshtimeout mesh-timeout-all-default -o yaml
  ursa get dataplanes --size 10 --offset 20 -o json

Types are named as in their documents (meshservice, meshservices), in any case, with or without
hyphens, or by their short name (msvc)..";

pub(crate) const DELETE: &str = "\
Examples:
  ursa delete meshtimeout slow --mesh default
  ursa delete mesh demo";

pub(crate) const INSPECT: &str = "\
Examples:
  ursa inspect meshes
  ursa inspect zones
  ursa inspect services --mesh default
  ursa inspect dataplanes --tag kuma.io/workload=web
  ursa inspect dataplane web                        # identity, state, what its Envoy refused
  ursa inspect dataplane web --type config-dump
  ursa inspect meshtimeout mesh-timeout-all-default # which proxies it reaches";

pub(crate) const GENERATE: &str = "\
Examples:
  ursa generate user-token --name mesh-system:admin --group mesh-system:admin --valid-for 24h
  ursa generate dataplane-token --mesh default --workload web --valid-for 720h
  ursa generate zone-token --zone east --valid-for 720h
  ursa generate tls-certificate --type server --hostname control.example.com
  ursa generate signing-key --format pem > key.pem
  ursa generate public-key --signing-key-path key.pem";

pub(crate) const CONFIG: &str = "\
Examples:
  ursa config control-planes add --name prod --address https://control.example.com:5682 \\
      --ca-cert-file ca.pem --auth-type tokens --auth-conf token=- < token   # token=- reads standard input
  ursa config control-planes list
  ursa config control-planes switch --name prod
  ursa config view";

pub(crate) const TICKET: &str = "\
Examples:
  ursa ticket create --workload web
  ursa ticket create --mesh default --workload web --workload backend --valid-for 15m";

pub(crate) const NODE: &str = "\
Examples:
  ursa get nodes
  ursa node revoke web-1                            # its sessions end at once
  ursa node restore web-1

The certificates that a revoked node's workloads hold stay good until they end.";

pub(crate) const ALLOW: &str = "\
Examples:
  ursa allow web backend                            # web may call backend
  ursa allow web backend --dry-run                  # the policy that would be written";

pub(crate) const UP: &str = "\
Examples:
  ursa up
  ursa up --workload web --workload backend --uses 2";

pub(crate) const JOIN: &str = "\
Examples:
  ursa join TICKET
  ursa join TICKET --unit web.service --port 8080
  ursa join TICKET --unit web.service --port 8080 --dry-run
  ssh control ursa ticket create --workload web | ursa join -";
