# Runs in the clean root, as root. Every line has to succeed.
set -eux
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
cd /
apt-get install ./portfwd_0.1.0-1_amd64.deb
dpkg --verify portfwd
portfwd --version
getent group portfwd
test "$(stat -c %a /var/lib/portfwd)" = 700
# The program is stripped, and needs no library that the package does not name.
test -z "$(ldd /usr/bin/portfwd | grep 'not found')"

systemd-analyze verify portfwd.service
systemd-analyze security --offline=true --threshold=30 --no-pager portfwd.service

for page in /usr/share/man/man1/portfwd*.1.gz; do
    mandoc -T lint -W error "$page"
    man --warnings --encoding=utf8 --local-file "$page" > /rendered 2> /complaints
    test -s /rendered
    test ! -s /complaints
done
man portfwd | grep -q 'portfwd-check-port'
man portfwd-add | grep -q 'portfwd add tcp 80'
mandoc -T lint -W error /usr/share/man/man5/portfwd.toml.5.gz
man 5 portfwd.toml | grep -q gateway
# Every command has a page.
for command in $(COMPLETE=fish portfwd -- portfwd '' | cut -f1 | grep '^[a-z]'); do
    man --where "portfwd-$command"
done

bash -c '
    source /usr/share/bash-completion/bash_completion
    _completion_loader portfwd || true
    complete -p portfwd
    COMP_WORDS=(portfwd ad) COMP_CWORD=1
    _clap_complete_portfwd portfwd ad portfwd
    test "$COMPREPLY" = add || test "$COMPREPLY" = "add "'
fish --no-config -c '
    source /usr/share/fish/vendor_completions.d/portfwd.fish
    complete --do-complete "portfwd ad" | grep -q "^add"'
zsh -f -c '
    fpath=(/usr/share/zsh/vendor-completions $fpath)
    autoload -Uz compinit && compinit -u
    test "$_comps[portfwd]" = _portfwd
    autoload -Uz +X _portfwd'

# Removing leaves the configuration, purging nothing.
dpkg --remove portfwd
test -e /etc/default/portfwd
test ! -e /usr/bin/portfwd
dpkg --install /portfwd_0.1.0-1_amd64.deb
test ! -e /etc/systemd/system/portfwd.service
dpkg --purge portfwd
test ! -e /etc/default/portfwd
test ! -e /var/lib/portfwd
dpkg --install /portfwd_0.1.0-1_amd64.deb
