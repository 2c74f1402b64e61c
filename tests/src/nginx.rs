//! A real web server: nginx with a generated configuration.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::address::Family;
use crate::deadline::{PATIENCE, wait_for, wait_until};
use crate::namespace::Namespace;
use crate::process::Process;

/// nginx in a namespace, serving a directory of its own over IPv4 and IPv6.
pub struct Nginx {
    process: Process,
    directory: TempDir,
}

/// A line of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Who asked, as the server sees it.
    pub client: String,
    /// The first line of the request.
    pub request: String,
    /// The HTTP status of the answer.
    pub status: u16,
}

impl Nginx {
    /// Starts nginx on `port` of every address of `namespace`, serving `files` (name, content).
    pub fn start(namespace: &Namespace, port: u16, files: &[(&str, &[u8])]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pfwd-nginx-").tempdir()?;
        let root = directory.path().join("html");
        fs::create_dir(&root)?;
        for (name, content) in files {
            fs::write(root.join(name), content).with_context(|| format!("write {name}"))?;
        }
        let configuration = directory.path().join("nginx.conf");
        fs::write(&configuration, configuration_text(&directory, port))?;
        let mut command = namespace.command("nginx")?;
        command
            .arg("-p")
            .arg(directory.path())
            .arg("-c")
            .arg(&configuration)
            .args(["-e", "stderr"]);
        let nginx = Self {
            process: Process::spawn(command)?,
            directory,
        };
        nginx
            .wait_until_listening(namespace, port)
            .with_context(|| format!("start nginx: {}", nginx.process.output()))?;
        Ok(nginx)
    }

    fn wait_until_listening(&self, namespace: &Namespace, port: u16) -> Result<()> {
        for family in Family::BOTH {
            let loopback = match family {
                Family::V4 => [127, 0, 0, 1].into(),
                Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
            };
            let endpoint = SocketAddr::new(loopback, port);
            wait_until("nginx to listen", PATIENCE, || {
                namespace.run(|| TcpStream::connect(endpoint).is_ok())
            })?;
        }
        Ok(())
    }

    /// The lines of the access log so far.
    pub fn accesses(&self) -> Result<Vec<Access>> {
        let path = self.access_log();
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        text.lines().map(parse_access).collect()
    }

    /// Waits for an access that `wanted` accepts: nginx logs a request only after its answer.
    pub fn wait_for_access(&self, wanted: impl Fn(&Access) -> bool) -> Result<Access> {
        wait_for("a line in nginx's access log", PATIENCE, || {
            Ok(self.accesses()?.into_iter().find(&wanted))
        })
        .with_context(|| format!("the access log has {:?}", self.accesses()))
    }

    fn access_log(&self) -> PathBuf {
        self.directory.path().join("access.log")
    }
}

fn parse_access(line: &str) -> Result<Access> {
    let mut fields = line.split('\t');
    let mut next = || {
        fields
            .next()
            .with_context(|| format!("access log line {line:?}"))
    };
    Ok(Access {
        client: next()?.to_string(),
        request: next()?.to_string(),
        status: next()?.parse()?,
    })
}

/// One process in the foreground, so that killing it by its pid leaves nothing behind.
fn configuration_text(directory: &TempDir, port: u16) -> String {
    let base = directory.path().display();
    format!(
        "daemon off;
master_process off;
user root;
pid {base}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    log_format lab '$remote_addr\t$request\t$status';
    access_log {base}/access.log lab;
    client_body_temp_path {base}/body;
    proxy_temp_path {base}/proxy;
    fastcgi_temp_path {base}/fastcgi;
    uwsgi_temp_path {base}/uwsgi;
    scgi_temp_path {base}/scgi;
    default_type application/octet-stream;
    client_max_body_size 0;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    server {{
        listen 0.0.0.0:{port};
        listen [::]:{port} ipv6only=on;
        root {base}/html;
    }}
}}
"
    )
}
