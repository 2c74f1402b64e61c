//! `portfwd run`: owns the instance while it runs. What it puts into the kernel stays when it ends; a new daemon adopts it.

mod configure;
mod description;
mod interfaces;
mod lease;
pub(crate) mod lock;
mod memory;
mod names;
pub mod options;
mod outage;
mod privileges;
mod service;
mod sweep;
mod timing;
pub mod words;

use std::{fs::File, io::Read, time::Duration};

use anyhow::{Context, Result};
use log::{error, info, warn};
use portfwd_common::abi::{Config, Epoch, Instant, Pace};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Interval, MissedTickBehavior, interval, timeout},
};

use self::{
    interfaces::{Interfaces, Refreshed},
    lease::Lease,
    lock::Lock,
    names::Naming,
    service::Service,
    sweep::{Found, Sweeping},
    timing::Timing,
};
use crate::{
    bpf::{
        self, Pins, Tables, bpffs, clock::Clock, frames::Frames, load, pools::PoolKeeper,
        usages::UsageKeeper,
    },
    control::{
        gateway::{Gateway, Shared},
        server::ControlSocket,
        shutdown::Shutdown,
    },
    failure::{Failure, Kind},
    netlink::event::{Changes, Events},
    state::State,
};
use options::{AttachMode, InterfaceOption, Options};

/// How long a flow entry trusts the route it has cached, if nobody vouches for it.
const VALIDITY: Duration = Duration::from_secs(1);

/// Everything is looked at again this often, should the kernel not have told a change.
const REVIEW: Duration = Duration::from_secs(30);
/// What could not be followed is tried again this soon.
const RETRY: Duration = Duration::from_secs(1);
/// Requests that are being answered when the daemon ends get this long.
const FAREWELL: Duration = Duration::from_secs(2);

/// Runs the daemon until SIGINT, SIGTERM or `POST /v1/shutdown`. The thread must be in the instance's network namespace.
pub fn run(options: Options) -> Result<()> {
    memory::be_thrifty();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let result = runtime.block_on(Daemon::run(&options));
    // A lookup may be waiting for a name server that does not answer.
    runtime.shutdown_timeout(FAREWELL);
    result
}

/// The parts of a running daemon.
struct Daemon<'a> {
    options: &'a Options,
    interfaces: Interfaces<'a>,
    gateway: Shared,
}

impl<'a> Daemon<'a> {
    async fn run(options: &'a Options) -> Result<()> {
        let instance = &options.instance;
        privileges::check()?;
        let _lock = Lock::take(instance)?;
        // From here on no change is missed: what happens while everything is read comes as an event later.
        let mut events = Events::listen()?;
        let mut interfaces = Interfaces::find(&options.interfaces)?;
        bpffs::ensure_mounted()?;
        let pins = Pins::new(&instance.pins());
        let is_new = !pins.instance().exists();
        let started = Self::start(options, &pins, &mut interfaces).await;
        let (gateway, socket) = match started {
            Ok(started) => started,
            Err(error) => {
                if is_new && let Err(error) = bpf::pins::remove_instance(&instance.pins()) {
                    warn!("cannot remove what the failed start has left: {error:#}");
                }
                return Err(error);
            }
        };
        let daemon = Daemon {
            options,
            interfaces,
            gateway: Shared::new(gateway),
        };
        daemon.configure().await;
        daemon.serve(&mut events, socket).await
    }

    /// Applies the configuration, if there is one.
    fn configure(&self) -> impl Future<Output = ()> + Send + use<> {
        let (path, words) = (self.options.config.clone(), self.options.words.clone());
        configure::apply(self.gateway.clone(), path, words)
    }

    /// Brings everything into the kernel: maps, rules, interfaces, and only then packets.
    async fn start(
        options: &Options,
        pins: &Pins,
        interfaces: &mut Interfaces<'_>,
    ) -> Result<(Gateway, ControlSocket)> {
        let instance = &options.instance;
        let sizes = load::Sizes {
            max_flows: options.max_flows,
            max_half_open: options.max_half_open,
            max_ports: options.max_ports,
        };
        let is_generic = |of: &InterfaceOption| of.mode == AttachMode::XdpGeneric;
        let frames = if options.interfaces.iter().any(is_generic) {
            Frames::Whole
        } else {
            Frames::Scattered
        };
        let programs = load::load(instance, pins, sizes, frames)?;
        let mut tables = Tables::open_pinned(&instance.pins())?;
        let before = tables.config()?;
        let config = config(tables.clock(), before.epoch.next(), secret()?, options);
        // What the rules have set is theirs: they are taken over behind this.
        tables.write_config(&Config {
            flags: config.flags | (before.flags & (Config::HAS_RESTS | Config::HAS_LIGHTS)),
            ..config
        })?;
        let state = State::open(&instance.state_file())?;
        let wan = interfaces.write_addresses(&mut tables)?;
        let mut gateway = Gateway::new(
            instance.clone(),
            tables,
            state,
            wan.unwrap_or_default(),
            options.words.clone(),
        )?;
        gateway.set_networks(interfaces::networks()?);
        gateway.tables_mut().make_pools()?;
        // What nobody has confirmed in time, or has expired, while no daemon ran.
        gateway.tick()?;
        let socket = ControlSocket::bind(&instance.socket())?;
        interfaces.attach_all(pins.clone(), programs, gateway.tables_mut())?;
        gateway.tables_mut().bump_generation()?;
        gateway.set_interfaces(interfaces.reports())?;
        Ok((gateway, socket))
    }

    async fn serve(mut self, events: &mut Events, socket: ControlSocket) -> Result<()> {
        let instance = &self.options.instance;
        let (mut terminate, mut interrupt, mut hangup) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
        );
        let shutdown = Shutdown::new();
        let server = tokio::spawn(socket.serve(self.gateway.clone(), shutdown.clone()));
        let mut server = std::pin::pin!(server);
        let pins = Pins::new(&instance.pins());
        let pools = PoolKeeper::open(&pins)?;
        let usages = UsageKeeper::open(&pins)?;
        privileges::drop_most()?;
        let timing = Timing::new(self.gateway.clone());
        let mut lease = Lease::new(self.gateway.clone());
        let mut sweeping = Sweeping::start(Tables::open_pinned(&instance.pins())?, pools, usages);
        let mut naming = Naming::start(self.gateway.clone(), self.options.resolve_every);
        let mut review = interval(REVIEW);
        review.set_missed_tick_behavior(MissedTickBehavior::Delay);
        info!(
            "instance {} is ready: {}",
            instance.name(),
            self.interfaces.summary()
        );
        let mut service = Service::ready(&self.interfaces.summary());
        memory::give_back();
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                () = shutdown.requested() => break,
                ended = &mut server => {
                    let failed = Failure::new(Kind::Failed, "the control socket has ended");
                    ended.context("the task of the control socket has ended")?;
                    return Err(failed.into());
                }
                changes = events.next() => {
                    let refreshed = self.follow(changes.context("cannot receive from netlink")?);
                    attend(refreshed, &mut review, &mut sweeping);
                }
                _ = review.tick() => attend(self.review(), &mut review, &mut sweeping),
                _ = hangup.recv() => drop(tokio::spawn(self.configure())),
                () = timing.due() => timing.tick(),
                () = lease.due() => lease.renew(),
                swept = sweeping.next() => {
                    if let Some(found) = swept? {
                        self.release(&found);
                    }
                }
                resolved = naming.next() => resolved?,
                () = service.is_curious() => service.alive(),
            }
        }
        service.stopping();
        lease.end();
        shutdown.request();
        if timeout(FAREWELL, server).await.is_err() {
            warn!("a request was not finished");
        }
        info!(
            "ends; forwarding goes on in the kernel (`{0} run` adopts it, `{0} detach` takes it off)",
            instance.command()
        );
        Ok(())
    }

    /// Brings a change of the network into the maps. Every change makes the flows look at their routes again.
    fn follow(&mut self, changes: Changes) -> Refreshed {
        let shared = self.gateway.clone();
        let mut gateway = shared.lock();
        let refreshed = if changes.links || changes.addresses {
            self.refresh(&mut gateway)
        } else {
            Refreshed::default()
        };
        announce(&mut gateway);
        refreshed
    }

    /// Frees what rules that are gone have left, once their flows are gone too.
    fn release(&mut self, found: &Found) {
        let released = self.gateway.lock().release(&found.rules, found.began);
        if let Err(error) = released {
            error!("cannot free the places of rules that are gone: {error}");
        }
    }

    /// Looks whether everything is still as it was.
    fn review(&mut self) -> Refreshed {
        let shared = self.gateway.clone();
        let mut gateway = shared.lock();
        let refreshed = self.refresh(&mut gateway);
        if refreshed.changed {
            announce(&mut gateway);
        }
        refreshed
    }

    /// Follows interfaces and addresses. An interface may go while it is looked at.
    fn refresh(&mut self, gateway: &mut Gateway) -> Refreshed {
        self.try_refresh(gateway).unwrap_or_else(|error| {
            warn!("cannot follow a change of the network yet: {error:#}");
            Refreshed {
                changed: true,
                incomplete: true,
                readdressed: false,
            }
        })
    }

    fn try_refresh(&mut self, gateway: &mut Gateway) -> Result<Refreshed> {
        let mut refreshed = self.interfaces.refresh(gateway.tables_mut())?;
        if let Some(wan) = self.interfaces.write_addresses(gateway.tables_mut())? {
            refreshed.changed = true;
            refreshed.readdressed = true;
            gateway.set_wan_addresses(wan)?;
            gateway.tables_mut().make_pools()?;
        }
        gateway.set_networks(interfaces::networks()?);
        gateway.set_interfaces(self.interfaces.reports())?;
        Ok(refreshed)
    }
}

/// What a look at the network makes come earlier than it would.
fn attend(refreshed: Refreshed, review: &mut Interval, sweeping: &mut Sweeping) {
    if refreshed.incomplete {
        review.reset_after(RETRY);
    }
    if refreshed.readdressed {
        sweeping.hurry();
    }
}

/// Makes the flows look at everything again.
fn announce(gateway: &mut Gateway) {
    if let Err(error) = gateway.tables_mut().bump_generation() {
        error!("cannot announce a change of the network: {error:#}");
    }
}

/// A number that nobody can guess.
fn secret() -> Result<[u32; 2]> {
    const SOURCE: &str = "/dev/urandom";
    let mut bytes = [0; 8];
    File::open(SOURCE)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .with_context(|| format!("cannot read {SOURCE}"))?;
    Ok(bytemuck::cast(bytes))
}

fn config(clock: &Clock, epoch: Epoch, seed: [u32; 2], options: &Options) -> Config {
    let timeouts = &options.timeouts;
    let udp = clock.ticks(timeouts.udp);
    let pace = Pace::of(clock.ticks_per_second(), udp);
    Config {
        epoch,
        ticks_per_second: clock.ticks_per_second(),
        validity: clock.ticks(VALIDITY),
        leased_validity: lease::validity(clock, timeouts, VALIDITY),
        lease_end: Instant::default(),
        udp,
        tcp_opening: clock.ticks(timeouts.tcp_opening),
        tcp_established: clock.ticks(timeouts.tcp_established),
        tcp_closing: clock.ticks(timeouts.tcp_closing),
        seed,
        flags: flags(options),
        turn_bits: pace.period_bits,
        turns_per_tick: pace.per_tick,
    }
}

fn flags(options: &Options) -> u32 {
    let (keeps_mss, trusts_sources) = (!options.mss_clamp, !options.source_check);
    (u32::from(keeps_mss) * Config::KEEPS_MSS)
        | (u32::from(trusts_sources) * Config::TRUSTS_SOURCES)
}
