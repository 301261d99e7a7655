# For both formats. A package's script says what differs from this.
upgraded() { :; }
before_removal() { :; }
after_removal() { :; }
purge() { :; }

# Takes users of ours away, with their groups; no process of theirs runs any more.
remove_users() {
    for user; do
        if getent passwd "$user" >/dev/null; then
            userdel "$user" || echo "the user $user is still there; remove it with: userdel $user" >&2
        fi
        if getent group "$user" >/dev/null; then
            groupdel "$user" || echo "the group $user is still there; remove it with: groupdel $user" >&2
        fi
    done
}

remove_empty() {
    for directory; do
        if [ -d "$directory" ]; then
            rmdir --ignore-fail-on-non-empty "$directory"
        fi
    done
}
