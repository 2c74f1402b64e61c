//! A reference gateway: the kernel's load balancer, with one server behind each port and addresses translated.

use anyhow::{Context, Result, bail};

use crate::namespace::Namespace;
use crate::nftables::Forward;

/// Has the gateway's kernel balance what comes for the forwards; it goes when the namespace goes.
///
/// # Errors
/// If ipvsadm is not installed, or the kernel was built without IPVS.
pub fn forward(gateway: &Namespace, forwards: &[Forward]) -> Result<()> {
    for Forward { listen, target } in forwards {
        let (listen, target) = (listen.to_string(), target.to_string());
        for service in ["--tcp-service", "--udp-service"] {
            let service = [service, &listen];
            ipvsadm(gateway, &[&["--add-service"], &service[..]].concat())?;
            let server = ["--real-server", &target, "--masquerading"];
            ipvsadm(
                gateway,
                &[&["--add-server"], &service[..], &server[..]].concat(),
            )?;
        }
    }
    Ok(())
}

fn ipvsadm(gateway: &Namespace, arguments: &[&str]) -> Result<()> {
    let output = gateway
        .command("ipvsadm")?
        .args(arguments)
        .output()
        .context("start ipvsadm; is it installed?")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("ipvsadm {} failed: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}
