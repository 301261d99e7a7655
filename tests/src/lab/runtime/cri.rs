//! The few calls of the Container Runtime Interface (`runtime.v1`) that kubelet makes for a pod's network.
//!
//! Field numbers are those of Kubernetes' `api.proto`; what isn't needed is left out, as protobuf permits.

use std::collections::HashMap;

use anyhow::Context as _;
use http::uri::PathAndQuery;
use tonic::transport::Channel;

/// `PodSandboxMetadata`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxMetadata {
    /// `K8S_POD_NAME`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// `K8S_POD_UID`.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// `K8S_POD_NAMESPACE`.
    #[prost(string, tag = "3")]
    pub namespace: String,
    /// Counts sandboxes of one pod.
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

/// `DNSConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DnsConfig {
    /// Addresses.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// As in `resolv.conf`.
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// `PortMapping`; TCP.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PortMapping {
    /// The pod's port.
    #[prost(int32, tag = "2")]
    pub container_port: i32,
    /// The machine's port.
    #[prost(int32, tag = "3")]
    pub host_port: i32,
}

/// `NamespaceOption`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct NamespaceOption {
    /// [`NODE`] for the machine's own.
    #[prost(int32, tag = "1")]
    pub network: i32,
}

/// `NamespaceMode`'s value for what is the machine's own.
pub const NODE: i32 = 2;

/// `LinuxSandboxSecurityContext`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SandboxSecurity {
    /// Whose namespaces.
    #[prost(message, optional, tag = "1")]
    pub namespace_options: Option<NamespaceOption>,
    /// Whether its containers may be.
    #[prost(bool, tag = "6")]
    pub privileged: bool,
}

/// `LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LinuxPodSandboxConfig {
    /// Where the pod's control groups are made.
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
    /// What it may.
    #[prost(message, optional, tag = "2")]
    pub security_context: Option<SandboxSecurity>,
}

/// `PodSandboxConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxConfig {
    /// Which pod.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodSandboxMetadata>,
    /// Its name.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where its containers' logs are.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// Its resolver.
    #[prost(message, optional, tag = "4")]
    pub dns_config: Option<DnsConfig>,
    /// For `portmap`.
    #[prost(message, repeated, tag = "5")]
    pub port_mappings: Vec<PortMapping>,
    /// The pod's.
    #[prost(map = "string, string", tag = "6")]
    pub labels: HashMap<String, String>,
    /// The pod's.
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    /// Control groups.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPodSandboxConfig>,
}

/// `RunPodSandboxRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RunPodSandboxRequest {
    /// What to run.
    #[prost(message, optional, tag = "1")]
    pub config: Option<PodSandboxConfig>,
}

/// A message with one id: `RunPodSandboxResponse`, `StopPodSandboxRequest`, `RemovePodSandboxRequest`,
/// `CreateContainerResponse`, `StartContainerRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Id {
    /// Of the sandbox or container.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// An answer that says nothing, and a question that asks for all.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Empty {}

/// `PodSandboxStatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxStatusRequest {
    /// Which.
    #[prost(string, tag = "1")]
    pub id: String,
    /// With `info`.
    #[prost(bool, tag = "2")]
    pub verbose: bool,
}

/// `PodIP`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodIp {
    /// An address.
    #[prost(string, tag = "1")]
    pub ip: String,
}

/// `PodSandboxNetworkStatus`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxNetworkStatus {
    /// The first address.
    #[prost(string, tag = "1")]
    pub ip: String,
    /// The others.
    #[prost(message, repeated, tag = "2")]
    pub additional_ips: Vec<PodIp>,
}

/// `PodSandboxStatus`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxStatus {
    /// Which.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Which pod's.
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<PodSandboxMetadata>,
    /// 0 ready, 1 not.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Its addresses.
    #[prost(message, optional, tag = "5")]
    pub network: Option<PodSandboxNetworkStatus>,
}

/// `PodSandboxStatusResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxStatusResponse {
    /// What everybody may know.
    #[prost(message, optional, tag = "1")]
    pub status: Option<PodSandboxStatus>,
    /// What containerd adds, as JSON under `info`.
    #[prost(map = "string, string", tag = "2")]
    pub info: HashMap<String, String>,
}

/// `PodSandbox`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandbox {
    /// Which.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Which pod's.
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<PodSandboxMetadata>,
    /// 0 ready, 1 not.
    #[prost(int32, tag = "3")]
    pub state: i32,
}

/// `ListPodSandboxResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListPodSandboxResponse {
    /// All.
    #[prost(message, repeated, tag = "1")]
    pub items: Vec<PodSandbox>,
}

/// `ContainerMetadata`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerMetadata {
    /// Its name in the pod.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// `ImageSpec`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageSpec {
    /// Its name.
    #[prost(string, tag = "1")]
    pub image: String,
}

/// `Mount`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    /// Where the container sees it.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Where it is.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// For reading only.
    #[prost(bool, tag = "3")]
    pub readonly: bool,
}

/// `Capability`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Capability {
    /// Given.
    #[prost(string, repeated, tag = "1")]
    pub add: Vec<String>,
    /// Taken.
    #[prost(string, repeated, tag = "2")]
    pub drop: Vec<String>,
}

/// `SecurityProfile`; the runtime's own.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SecurityProfile {}

/// `LinuxContainerSecurityContext`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerSecurity {
    /// More and fewer than usual.
    #[prost(message, optional, tag = "1")]
    pub capabilities: Option<Capability>,
    /// All of them, and the machine's devices.
    #[prost(bool, tag = "2")]
    pub privileged: bool,
    /// As the sandbox.
    #[prost(message, optional, tag = "3")]
    pub namespace_options: Option<NamespaceOption>,
    /// Its files can't be changed.
    #[prost(bool, tag = "7")]
    pub readonly_rootfs: bool,
    /// No program of it gets more than it has.
    #[prost(bool, tag = "11")]
    pub no_new_privs: bool,
    /// Which system calls are allowed.
    #[prost(message, optional, tag = "15")]
    pub seccomp: Option<SecurityProfile>,
}

/// `LinuxContainerConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LinuxContainerConfig {
    /// What it may.
    #[prost(message, optional, tag = "2")]
    pub security_context: Option<ContainerSecurity>,
}

/// `ContainerConfig`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerConfig {
    /// Which.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<ContainerMetadata>,
    /// Of what.
    #[prost(message, optional, tag = "2")]
    pub image: Option<ImageSpec>,
    /// What it runs.
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    /// What it sees of the machine.
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    /// Its log, below the sandbox's folder; none if empty.
    #[prost(string, tag = "11")]
    pub log_path: String,
    /// What it may.
    #[prost(message, optional, tag = "15")]
    pub linux: Option<LinuxContainerConfig>,
}

/// `ContainerStatus`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStatus {
    /// [`EXITED`] when it has ended.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// How.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
}

/// `ContainerState`'s value for what has ended.
pub const EXITED: i32 = 2;

/// `ContainerStatusResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStatusResponse {
    /// Its state.
    #[prost(message, optional, tag = "1")]
    pub status: Option<ContainerStatus>,
}

/// `StopContainerRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StopContainerRequest {
    /// Which.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Seconds from SIGTERM to SIGKILL.
    #[prost(int64, tag = "2")]
    pub timeout: i64,
}

/// `CreateContainerRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateContainerRequest {
    /// Where.
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
    /// What.
    #[prost(message, optional, tag = "2")]
    pub config: Option<ContainerConfig>,
    /// As the sandbox was started.
    #[prost(message, optional, tag = "3")]
    pub sandbox_config: Option<PodSandboxConfig>,
}

/// `ExecSyncRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecSyncRequest {
    /// Where.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// What.
    #[prost(string, repeated, tag = "2")]
    pub cmd: Vec<String>,
    /// In seconds.
    #[prost(int64, tag = "3")]
    pub timeout: i64,
}

/// `ExecSyncResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecSyncResponse {
    /// What it printed.
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    /// What it complained of.
    #[prost(bytes = "vec", tag = "2")]
    pub stderr: Vec<u8>,
    /// How it ended.
    #[prost(int32, tag = "3")]
    pub exit_code: i32,
}

/// `StatusRequest`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct StatusRequest {
    /// With `info`.
    #[prost(bool, tag = "1")]
    pub verbose: bool,
}

/// `RuntimeCondition`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeCondition {
    /// `RuntimeReady` or `NetworkReady`.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// Whether it is so.
    #[prost(bool, tag = "2")]
    pub status: bool,
    /// Why.
    #[prost(string, tag = "4")]
    pub message: String,
}

/// `RuntimeStatus`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeStatus {
    /// What is ready.
    #[prost(message, repeated, tag = "1")]
    pub conditions: Vec<RuntimeCondition>,
}

/// `StatusResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatusResponse {
    /// What is ready.
    #[prost(message, optional, tag = "1")]
    pub status: Option<RuntimeStatus>,
    /// What containerd adds, as JSON: under `cniconfig` the conflists that it has read.
    #[prost(map = "string, string", tag = "2")]
    pub info: HashMap<String, String>,
}

/// Makes one call of the runtime service.
pub async fn call<Q, A>(channel: Channel, method: &'static str, question: Q) -> anyhow::Result<A>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.context("the runtime isn't there")?;
    let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}"))?;
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    let answer = client.unary(tonic::Request::new(question), path, codec).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| anyhow::anyhow!("{method}: {}", status.message()))
}
