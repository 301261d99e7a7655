//! A shim at work: everything that runs between its start and its end, or its replacement.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::arguments::Config;
use super::control::Control;
use super::directory::{Directory, Layout};
use super::dns::{Dns, NameServer};
use super::envoy::{Command, Ended, Handle, Supervisor};
use super::handover::{self, Handover, Passed};
use super::log::SetLogLevel;
use super::protocol::{CONTROL_SOCKET, DNS_FILE, EnvoyState};
use super::replace::Replacement;
use super::words::words;
use super::work::Work;
use super::xds::{Fallback, Xds};
use super::{Ready, process, unit, watchdog};
use crate::notify::Notifier;

/// Between two attempts to use settings that could not be used.
const RETRY: Duration = Duration::from_secs(1);
/// How often is looked whether the redirect is in place, as long as it isn't.
const REDIRECT_LOOK: Duration = Duration::from_millis(100);
/// How long a signal may take from its handler to whoever waits for it.
const ON_ITS_WAY: Duration = Duration::from_millis(2);
/// How often systemd hears that stopping still makes progress, and for how long each word counts.
const STOPPING_LOOK: Duration = Duration::from_secs(5);
const STOPPING_EXTENSION: Duration = Duration::from_secs(20);

/// Serves until stopped (nothing is returned), or until another program is to go on with what is returned.
pub(super) async fn serve(
    config: &Config,
    ready: Ready,
    binary: &Path,
    fallback: Arc<dyn Fallback>,
    set_log_level: SetLogLevel,
    span: tracing::Span,
) -> anyhow::Result<Option<Box<Handover>>> {
    let Ready {
        dir,
        directory,
        sockets,
        present,
        envoy: left,
        announced,
        reexecs,
        stop: told_to_stop,
        failure,
    } = ready;
    let Directory { control: control_socket, xds: xds_socket, lock } = directory;
    let notifier = Notifier::from_env().context("cannot talk to the service manager")?;
    let mut signals = Signals::new().context("cannot listen for signals")?;
    handover::let_signals_through().context("cannot take signals")?;

    let layout = if config.service.is_some() { Layout::Unit } else { Layout::Closed };
    let resumed = left.is_some();
    let dns = Dns::new();
    let names = Arc::new(NameServer::new(Arc::clone(&dns), sockets));
    let xds = Xds::new(xds_socket);
    let (launch, launch_seen) = watch::channel(None);
    let (supervisor, envoy) = Supervisor::new(launch_seen, left);
    let work = Arc::new(Work {
        private: layout.private(&dir),
        base_id: config.base_id(&dir),
        launch,
        last_good: watch::Sender::new(None),
        workload: watch::Sender::new(String::new()),
        dns,
        names: Arc::clone(&names),
        set_log_level,
        commands: envoy.commands.clone(),
        span,
        present: Mutex::default(),
    });
    let level = present.log_level.clone();
    if let Some(settings) = present.settings {
        work.resume(settings);
    } else if let (Some(launch), Some(workload)) = (config.launch(&dir), &config.workload) {
        work.dns.configure(&dir.join(DNS_FILE), &config.resolv_conf);
        work.name(workload);
        work.last_good.send_replace(config.last_good.clone());
        work.launch.send_replace(Some(launch));
    }
    if let Some(level) = level
        && let Err(reason) = work.set_log_level(&level)
    {
        warn!(%reason, "the log level cannot be kept");
    }

    let (begin, mut begun) = mpsc::channel(1);
    let replacement = Arc::new(Replacement {
        binary: binary.to_owned(),
        work: Arc::clone(&work),
        envoy: envoy.clone(),
        begin,
    });
    let (stop, mut stopped) = mpsc::channel(1);
    let pid = i32::try_from(std::process::id()).context("our own pid")?;
    let control = Arc::new(Control {
        service: config.service.clone(),
        pid,
        start_time: process::start_time(pid).context("our own start time; is /proc mounted?")?,
        reexecs,
        agent_uid: config.agent_uid.or_else(|| {
            config.service.as_ref().and_then(|_| unit::agent_uid(&config.agent_user, &config.state_dir))
        }),
        work: Arc::clone(&work),
        envoy: envoy.clone(),
        xds: Arc::clone(&xds),
        replacement: Arc::clone(&replacement),
        stop,
    });
    let listener = control_socket.try_clone().and_then(UnixListener::from_std).context("control.sock")?;

    let told_ready = AtomicBool::new(announced);
    if told_ready.load(Ordering::Relaxed) {
        notifier.tell(&["READY=1"]);
    }
    let tell = tell(&notifier, &told_ready, &envoy, &xds, &work, failure);
    let watched = dir.join(CONTROL_SOCKET);
    let watchdog = watchdog::feed(&notifier, &watched, &envoy.commands);
    let configure = async {
        if let Some(service) = &config.service {
            configure(&work, &config.state_dir, service).await;
        }
        std::future::pending::<()>().await;
    };
    let drain_time = || work.launch.borrow().as_ref().map_or(Duration::ZERO, |launch| launch.drain_time);
    let ordered = Cell::new(told_to_stop);
    let stopping = async {
        let drain = if let Some(drain) = ordered.get() {
            drain
        } else {
            tokio::select! {
                drain = stopped.recv() => drain.unwrap_or_default(),
                _ = signals.terminate.recv() => drain_time(),
                _ = signals.interrupt.recv() => drain_time(),
            }
        };
        ordered.set(Some(drain));
        info!(?drain, "stopping");
        notifier.tell(&["STOPPING=1"]);
        if envoy.commands.send(Command::Stop(drain)).await.is_err() {
            warn!("Envoy was stopped already");
        }
        loop {
            notifier.tell(&[&format!("EXTEND_TIMEOUT_USEC={}", STOPPING_EXTENSION.as_micros())]);
            sleep(STOPPING_LOOK).await;
        }
    };
    let replacing = async {
        loop {
            tokio::select! {
                _ = signals.hangup.recv() => match replacement.check().await {
                    Ok(()) => replacement.begin(),
                    Err(reason) => {
                        warn!("{reason}");
                        notifier.status(&reason);
                    }
                },
                Some(()) = begun.recv() => {
                    if told_ready.load(Ordering::Relaxed) {
                        notifier.reloading();
                    }
                    // Answered by the end of the supervisor, unless that is stopping Envoy already.
                    let _ = envoy.commands.send(Command::HandOver).await;
                }
            }
        }
    };
    info!(pid, uid = nix::unistd::geteuid().as_raw(), resumed, reexecs, "the shim is ready");
    let naming = names.run();
    tokio::pin!(naming);
    let serving = control.run(listener);
    let fallback = xds.run(fallback, work.last_good.subscribe());
    let ended = tokio::select! {
        ended = supervisor.run() => ended,
        named = &mut naming => {
            named.context("the DNS sockets failed")?;
            return Ok(None);
        }
        () = serving => return Ok(None),
        () = fallback => return Ok(None),
        () = stopping => return Ok(None),
        () = replacing => return Ok(None),
        () = tell => return Ok(None),
        () = watchdog => return Ok(None),
        () = configure => return Ok(None),
    };
    let Ended::HandedOver(envoy) = ended else { return Ok(None) };
    handover::hold_signals().context("cannot hold signals")?;
    names.stop();
    if let Err(error) = naming.await {
        warn!(%error, "the name server ended");
    }
    // What came before they were held is on its way within this process: nobody but the next program could act on it.
    let late = async {
        tokio::select! {
            // Whoever could still send is gone.
            Some(drain) = stopped.recv() => drain,
            _ = signals.terminate.recv() => drain_time(),
            _ = signals.interrupt.recv() => drain_time(),
        }
    };
    if ordered.get().is_none() {
        ordered.set(timeout(ON_ITS_WAY, late).await.ok());
    }
    let present = work.present().clone();
    let state = || -> io::Result<Handover> {
        Ok(Handover {
            version: handover::VERSION,
            control: Passed::copy(&control_socket)?,
            xds: Passed::copy(xds.listener())?,
            lock: Passed::copy(&*lock)?,
            dns: names.sockets().map(|sockets| sockets.hand_over()).transpose()?,
            settings: present.settings,
            log_level: present.log_level,
            envoy: *envoy,
            ready: told_ready.load(Ordering::Relaxed),
            reexecs,
            stop_ms: ordered.get().map(|drain| u64::try_from(drain.as_millis()).unwrap_or(u64::MAX)),
        })
    };
    Ok(Some(Box::new(state().context("cannot hand over")?)))
}

/// Uses what the agent left on disk, as soon as that is possible. An agent that comes earlier is faster.
async fn configure(work: &Work, state_dir: &Path, service: &str) {
    let mut said = String::new();
    while work.launch.borrow().is_none() {
        let reason = match unit::settings(state_dir, service) {
            Ok(None) => return,
            Ok(Some(settings)) => match work.configure(settings) {
                Ok(()) => return,
                Err(reason) => reason,
            },
            Err(reason) => reason,
        };
        if said != reason {
            warn!(%reason, "the settings on disk cannot be used");
            // The supervisor reads its commands while it waits.
            let _ = work.command(Command::Awaited(format!("settings that can be used: {reason}")));
            said = reason;
        }
        sleep(RETRY).await;
    }
}

/// Tells the service manager what goes on, and once that we are ready. Never returns.
async fn tell(
    notifier: &Notifier,
    told_ready: &AtomicBool,
    envoy: &Handle,
    xds: &Xds,
    work: &Work,
    mut failure: Option<String>,
) {
    let (mut status, mut role) = (envoy.status.clone(), xds.roles());
    let mut said = String::new();
    loop {
        let present = status.borrow_and_update().clone();
        role.mark_unchanged();
        let live = present.state == EnvoyState::Live;
        let mut line = words(&present, xds.role());
        let open = if live && !told_ready.load(Ordering::Relaxed) { work.lacks_redirect() } else { None };
        if let Some(why) = &open {
            line = format!("{line}; not ready before the redirect is in place: {why}");
        }
        if let Some(failure) = failure.take() {
            line = format!("{line}; {failure}");
        }
        if line != said {
            notifier.status(&line);
            said = line;
        }
        if live && open.is_none() && !told_ready.swap(true, Ordering::Relaxed) {
            notifier.tell(&["READY=1"]);
        }
        tokio::select! {
            Ok(()) = status.changed() => {}
            Ok(()) = role.changed() => {}
            () = sleep(REDIRECT_LOOK), if open.is_some() => {}
            else => std::future::pending().await,
        }
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}
