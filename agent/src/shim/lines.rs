//! Lines over a Unix socket, with which a descriptor may travel.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Longer lines end the connection: nothing we say comes near it.
const MAX_LINE: usize = 256 * 1024;

/// Sends one line; `fd` travels with its first byte.
pub(super) async fn send(stream: &UnixStream, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut rest = Vec::with_capacity(line.len() + 1);
    rest.extend_from_slice(line);
    rest.push(b'\n');
    let mut rest = rest.as_slice();
    let mut fd = fd;
    while !rest.is_empty() {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&raw)];
            let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            Ok(sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(rest)], control, flags, None)?)
        });
        match sent {
            Ok(length) => {
                rest = &rest[length..];
                fd = None;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes lines and descriptors from a socket.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    buffer: Vec<u8>,
    scanned: usize,
    descriptors: VecDeque<OwnedFd>,
}

impl Receiver {
    /// The next line without its end, or `None` when the other side closed. Dropping the future loses nothing.
    pub(super) async fn line(&mut self, stream: &UnixStream) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=self.scanned + end).collect();
                line.pop();
                self.scanned = 0;
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() > MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line is longer than 256 KiB"));
            }
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || self.receive(stream.as_fd())) {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed within a line")),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The oldest descriptor that came and was not taken yet.
    pub(super) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    #[expect(unsafe_code, reason = "descriptors arrive as plain numbers")]
    fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut chunk = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut chunk)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let length = message.bytes;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                for fd in received {
                    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
                    self.descriptors.push_back(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        self.buffer.extend_from_slice(&chunk[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[tokio::test]
    async fn lines_and_descriptors_arrive_together() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let long = vec![b'x'; 100_000];
        let sending = async {
            send(&ours, b"one", None).await.unwrap();
            send(&ours, b"two", Some(writer.as_fd())).await.unwrap();
            send(&ours, &long, None).await.unwrap();
            drop((ours, writer));
        };
        let receiving = async {
            let mut receiver = Receiver::default();
            assert_eq!(receiver.line(&theirs).await.unwrap().unwrap(), b"one");
            assert_eq!(receiver.line(&theirs).await.unwrap().unwrap(), b"two");
            let mut passed = std::fs::File::from(receiver.descriptor().unwrap());
            assert_eq!(receiver.line(&theirs).await.unwrap().unwrap(), long);
            assert!(receiver.line(&theirs).await.unwrap().is_none());
            passed.write_all(b"through").unwrap();
        };
        tokio::join!(sending, receiving);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }
}
