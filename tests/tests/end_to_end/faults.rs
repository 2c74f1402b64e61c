//! What the machine refuses the daemon: each time one line says what and what to do, and what was there goes on.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use portfwd_tests::cgroup::Cgroup;
use portfwd_tests::daemon::{DaemonOptions, Mode, binary};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::other_build::OtherBuild;
use portfwd_tests::process::output_within;
use portfwd_tests::{Family, LabOptions, udp, unit};
use redb::ReadableDatabase;

use crate::scene::{Scene, TARGET, listen, rule_name};

const FAILED: i32 = 1;

/// A gateway that forwards, whose daemon has just been killed.
fn orphaned() -> Result<Scene> {
    let mut scene = Scene::forwarding(Mode::Tc, "udp")?;
    scene.daemon.kill9()?;
    Ok(scene)
}

/// Starts the daemon where `surroundings`, lines of a shell, have changed what is mounted, for it alone.
fn start_where(scene: &Scene, surroundings: &str, options: &[&str]) -> Result<Output> {
    let daemon = scene.daemon.command();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-ec"])
        .arg(format!("{surroundings}\nexec \"$@\""))
        .arg("sh")
        .arg(daemon.get_program())
        .args(daemon.get_args())
        .args(["run", "--wan", "wan0", "--lan", "lan0", "--mode", "tc"])
        .args(options);
    output_within(&mut command, PATIENCE)
}

/// One line with the code, what is wrong and a command to type.
fn expect_refusal(output: &Output, code: i32, about: &[&str]) -> Result<()> {
    let stderr = String::from_utf8(output.stderr.clone())?;
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let complaints: Vec<_> = stderr
        .lines()
        .filter(|line| line.starts_with("portfwd: ") || line.contains("panicked"))
        .collect();
    assert_eq!(complaints.len(), 1, "one line, not:\n{stderr}");
    for word in about.iter().chain(&["(hint: "]) {
        ensure!(
            complaints[0].contains(word),
            "{:?} does not say {word:?}",
            complaints[0]
        );
    }
    Ok(())
}

/// The gateway forwards as before the failed start, and the next daemon finds everything.
fn expect_nothing_lost(scene: &mut Scene) -> Result<()> {
    {
        let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
        let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
        udp::exchange(&socket, b"still forwarded")?;
    }
    scene.daemon.start()?;
    assert_eq!(scene.daemon.rules()?.len(), 2);
    assert_eq!(
        scene.daemon.rule(rule_name(Family::V4))?.to_target.packets,
        1
    );
    scene.daemon.add("new", "tcp", "9090", "10.2.0.2:90")
}

/// The daemon's own.
const DIRECTORIES: [&str; 2] = ["/run/portfwd", "/var/lib/portfwd"];

#[test]
fn a_directory_that_cannot_be_written_to_is_named() -> Result<()> {
    let mut scene = orphaned()?;
    for directory in DIRECTORIES {
        let surroundings = format!("mount -t tmpfs -o ro none {directory}");
        let output = start_where(&scene, &surroundings, &[])?;
        expect_refusal(&output, FAILED, &[directory, "Read-only file system"])?;
    }
    expect_nothing_lost(&mut scene)
}

#[test]
fn a_file_in_the_place_of_a_directory_is_named() -> Result<()> {
    let mut scene = orphaned()?;
    for directory in DIRECTORIES {
        start_with_a_file_for(&scene, directory)?;
    }
    expect_nothing_lost(&mut scene)
}

fn start_with_a_file_for(scene: &Scene, directory: &str) -> Result<()> {
    let parent = Path::new(directory).parent().context("it has a parent")?;
    // The directory's parent is replaced by an empty one, in which its name is a file's.
    let surroundings = format!(
        "mount -t tmpfs none {parent}; mkdir -p /run/netns; touch {directory}; true",
        parent = parent.display()
    );
    // In /run is also what names the namespaces: it is entered before.
    let namespace = scene.lab.gateway.name().to_string();
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{namespace}"))
        .args(["--", "unshare", "--mount", "sh", "-ec"])
        .arg(format!("{surroundings}\nexec \"$@\""))
        .arg("sh")
        .arg(scene.daemon.command().get_program())
        .args(["--instance", &namespace, "run"])
        .args(["--wan", "wan0", "--lan", "lan0", "--mode", "tc"]);
    let output = output_within(&mut command, PATIENCE)?;
    expect_refusal(&output, FAILED, &[directory])
}

/// Mounting takes more than the daemon is given by its unit.
#[test]
fn a_bpf_file_system_that_is_not_mounted_is_named_with_the_command() -> Result<()> {
    let mut scene = orphaned()?;
    let bounds: String = unit::capabilities()?
        .iter()
        .map(|name| format!(",+{name}"))
        .collect();
    let namespace = scene.lab.gateway.name().to_string();
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{namespace}"))
        .args(["--", "unshare", "--mount", "sh", "-ec"])
        .arg("umount --lazy /sys/fs/bpf\nexec \"$@\"")
        .args(["sh", "setpriv", "--inh-caps=-all", "--ambient-caps=-all"])
        .arg(format!("--bounding-set=-all{bounds}"))
        .arg(scene.daemon.command().get_program())
        .args(["--instance", &namespace, "run"])
        .args(["--wan", "wan0", "--lan", "lan0", "--mode", "tc"]);
    let output = output_within(&mut command, PATIENCE)?;
    expect_refusal(&output, 4, &["/sys/fs/bpf", "mount -t bpf bpf /sys/fs/bpf"])?;
    expect_nothing_lost(&mut scene)
}

/// With every capability it is mounted.
#[test]
fn a_bpf_file_system_that_is_not_mounted_is_mounted_if_that_is_allowed() -> Result<()> {
    let scene = orphaned()?;
    // It cannot start for another reason, but by then it has mounted.
    let output = start_where(
        &scene,
        "umount --lazy /sys/fs/bpf\nmount -t tmpfs -o ro none /var/lib/portfwd",
        &[],
    )?;
    expect_refusal(&output, FAILED, &["/var/lib/portfwd"])
}

/// What becomes of the bytes of the state file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Emptied,
    CutTo(usize),
    CutByHalf,
    Overwritten,
    Garbage,
}

impl Damage {
    fn of(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Emptied => Vec::new(),
            Self::CutTo(length) => bytes[..length.min(bytes.len())].to_vec(),
            Self::CutByHalf => bytes[..bytes.len() / 2].to_vec(),
            // The header stays, and says that all is well.
            Self::Overwritten => {
                let mut bytes = bytes.to_vec();
                let half = bytes.len() / 2;
                bytes[4096..half].fill(0xff);
                bytes
            }
            Self::Garbage => {
                let mut random = fastrand::Rng::with_seed(7);
                (0..bytes.len()).map(|_| random.u8(..)).collect()
            }
        }
    }
}

#[test]
fn a_damaged_state_file_is_refused_and_left_as_it_is() -> Result<()> {
    let mut scene = orphaned()?;
    let path = scene.daemon.state_file();
    let whole = fs::read(&path)?;
    for damage in [
        // In its header, and behind it.
        Damage::CutTo(100),
        Damage::CutTo(4096),
        Damage::CutByHalf,
        Damage::Overwritten,
        Damage::Garbage,
        Damage::Emptied,
    ] {
        expect_damage_refused(&scene, &path, &damage.of(&whole))
            .with_context(|| format!("{damage:?}"))?;
    }
    fs::write(&path, &whole)?;
    expect_nothing_lost(&mut scene)
}

fn expect_damage_refused(scene: &Scene, path: &Path, damaged: &[u8]) -> Result<()> {
    fs::write(path, damaged)?;
    let output = start_where(scene, "true", &[])?;
    expect_refusal(
        &output,
        FAILED,
        &[&path.display().to_string(), "move it away"],
    )?;
    ensure!(fs::read(path)? == damaged, "the file was changed");
    // What only reads says so as well.
    let rules = scene.daemon.cli(&["rules"])?;
    ensure!(
        !String::from_utf8_lossy(&rules.stderr).contains("panicked") && !rules.status.success(),
        "{rules:?}"
    );
    Ok(())
}

#[test]
fn a_state_file_of_a_newer_version_is_refused_and_stays_one() -> Result<()> {
    const NUMBERS: redb::TableDefinition<&str, u32> = redb::TableDefinition::new("numbers");
    let mut scene = orphaned()?;
    let path = scene.daemon.state_file();
    let whole = fs::read(&path)?;
    {
        let database = redb::Database::open(&path)?;
        let transaction = database.begin_write()?;
        transaction.open_table(NUMBERS)?.insert("format", 4711)?;
        transaction.commit()?;
    }
    let output = start_where(&scene, "true", &[])?;
    expect_refusal(&output, FAILED, &["format 4711", "another version"])?;
    let format = {
        let database = redb::Database::open(&path)?;
        let numbers = database.begin_read()?.open_table(NUMBERS)?;
        numbers.get("format")?.map(|format| format.value())
    };
    assert_eq!(format, Some(4711));
    fs::write(&path, &whole)?;
    expect_nothing_lost(&mut scene)
}

/// The state file is on a disk that fills up while the daemon runs.
#[test]
fn a_full_disk_refuses_a_change_whole_and_the_next_one_works_when_there_is_room() -> Result<()> {
    let lab = LabOptions::default().build()?;
    let options = DaemonOptions {
        state_disk: Some(8 << 20),
        ..DaemonOptions::new(Mode::Tc)
    };
    let daemon = options.start(&lab.gateway)?;
    let scene = Scene { daemon, lab };
    scene.forward("udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"there is room")?;

    // Through the daemon's own eyes: its disk is mounted for nobody else.
    let pid = scene.daemon.pid().context("the daemon runs")?;
    let ballast = format!("/proc/{pid}/root/var/lib/portfwd/ballast");
    fill(Path::new(&ballast))?;
    let mut refused = None;
    // Room that the file has already is used first.
    for number in 0..2000 {
        let port = (20_000 + number).to_string();
        let output = scene.daemon.cli(&["add", "tcp", &port, "10.2.0.2"])?;
        if !output.status.success() {
            refused = Some((output, port));
            break;
        }
    }
    let (output, port) = refused.context("the disk never was full")?;
    expect_refusal(&output, FAILED, &["No space left on device"])?;
    let rules = scene.daemon.rules()?;
    ensure!(
        rules.iter().all(|rule| rule.listen != port),
        "half of the change was made"
    );
    udp::exchange(&socket, b"forwarding goes on")?;
    scene.daemon.ok(&["status"])?;

    fs::remove_file(&ballast)?;
    scene.daemon.ok(&["add", "tcp", &port, "10.2.0.2"])?;
    assert_eq!(scene.daemon.rules()?.len(), rules.len() + 1);
    Ok(())
}

/// Writes until the disk is full.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut length = 64 << 10;
    while length > 0 {
        match file.write(&vec![7; length]) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => length /= 2,
            Err(error) => return Err(error).context("fill the disk"),
        }
    }
    Ok(())
}

#[test]
fn programs_that_the_kernel_refuses_are_named_and_the_old_ones_stay() -> Result<()> {
    let mut scene = orphaned()?;
    let before = scene.daemon.program_ids()?;
    let refused = OtherBuild::refused()?;
    scene.daemon.use_binary(refused.path());
    let output = start_where(&scene, "true", &[])?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let words = format!("kernel {} refuses program portfwd_", release.trim());
    expect_refusal(&output, FAILED, &[&words, "verifier"])?;
    scene.daemon.use_binary(&binary()?);
    ensure!(
        scene.daemon.program_ids()? == before,
        "other programs are pinned"
    );
    expect_nothing_lost(&mut scene)
}

/// The tables are made at once and whole, so a machine that has no memory for them says so at the start.
#[test]
fn tables_that_there_is_no_memory_for_are_refused_with_their_size() -> Result<()> {
    let mut scene = orphaned()?;
    // Less than the tables take, and more than the daemon takes itself to load the programs.
    let group = Cgroup::with_memory(128 << 20)?;
    // The tables of this instance are there already.
    let second = scene.daemon.second();
    let mut command = second.command();
    command.args(["run", "--wan", "wan0", "--lan", "lan0", "--mode", "tc"]);
    let output = output_within(&mut group.confine(&command), PATIENCE)?;
    expect_refusal(&output, FAILED, &["MiB", "--max-flows"])?;
    let pins = second.pins();
    ensure!(!pins.exists(), "{} was left", pins.display());
    second.end()?;
    expect_nothing_lost(&mut scene)
}
