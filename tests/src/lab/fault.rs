//! Faults that a healthy machine doesn't have: a kernel without nf_tables, a disk without space.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// From now on this process, and what it executes, gets the answer of a kernel without nf_tables when it opens a
/// socket to netfilter. Needs root, and can't be taken back.
#[expect(unsafe_code, reason = "neither std nor nix installs seccomp filters")]
pub fn forbid_nf_tables() -> io::Result<()> {
    const NETLINK_NETFILTER: u32 = 12;
    // Offsets within struct seccomp_data; on little endian an argument's lower half comes first.
    const NUMBER: u32 = 0;
    const DOMAIN: u32 = 16;
    const PROTOCOL: u32 = 32;
    let step = |code: u32, k: u32, jf: u8| -> io::Result<libc::sock_filter> {
        Ok(libc::sock_filter { code: u16::try_from(code).map_err(io::Error::other)?, jt: 0, jf, k })
    };
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0);
    let skip_unless = |value, skip| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, skip);
    let answer = |value| step(libc::BPF_RET | libc::BPF_K, value, 0);
    let number = |value: i64| u32::try_from(value).map_err(io::Error::other);
    let mut program = [
        load(NUMBER)?,
        skip_unless(number(libc::SYS_socket)?, 5)?,
        load(DOMAIN)?,
        skip_unless(number(libc::AF_NETLINK.into())?, 3)?,
        load(PROTOCOL)?,
        skip_unless(NETLINK_NETFILTER, 1)?,
        answer(libc::SECCOMP_RET_ERRNO | number(libc::EPROTONOSUPPORT.into())?)?,
        answer(libc::SECCOMP_RET_ALLOW)?,
    ];
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the call returns.
    let done =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// A small disk of its own, which can be filled.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Mounts an empty one of so many bytes. It must go before the lab that it is mounted in.
    pub fn mount(path: &Path, bytes: u64) -> anyhow::Result<Self> {
        super::create_open(path)?;
        let options = format!("size={bytes},mode=755");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("ursa-lab"), path, Some("tmpfs"), flags, Some(options.as_str()))
            .with_context(|| format!("cannot mount a disk at {}", path.display()))?;
        Ok(Self { path: path.to_owned() })
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }

    /// Leaves so many bytes free, and no more.
    pub fn fill(&self, free: u64) -> anyhow::Result<()> {
        let path = self.ballast();
        let mut ballast = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        // Until there is no more: what a disk says of its free space may be an estimate.
        loop {
            match ballast.write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error).with_context(|| format!("cannot fill {}", path.display())),
            }
        }
        let length = ballast.metadata()?.len();
        ensure!(length > free, "{} has no {free} bytes", self.path.display());
        Ok(ballast.set_len(length - free)?)
    }

    /// Takes the ballast away.
    pub fn free(&self) -> anyhow::Result<()> {
        std::fs::remove_file(self.ballast()).context("there is no ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Detached: it goes when the last file on it is closed.
        if let Err(error) = umount2(&self.path, MntFlags::MNT_DETACH) {
            eprintln!("lab: cannot unmount {}: {error}", self.path.display());
        }
    }
}
