# PROGRAMS DIRECTORY ROLE: runs a PostgreSQL server in the directory until standard input ends, and deletes what it has made.
# Each line of the input is the name of a signal: the server gets it, and is started again when it has ended.
programs=$1 dir=$2 role=$3
umask 077
"$programs/initdb" --pgdata="$dir/data" --username="$role" --auth=trust --no-sync --encoding=UTF8 --locale=C >"$dir/initdb.log" 2>&1 || {
	cat "$dir/initdb.log" >&2
	exit 1
}
# Nothing here has to outlive a power failure.
start() {
	"$programs/postgres" -D "$dir/data" -k "$dir" -c listen_addresses= -c fsync=off -c full_page_writes=off -c synchronous_commit=off -c autovacuum=off \
		-c max_connections=200 -c shared_buffers=64MB -c timezone=America/Caracas </dev/null &
	server=$!
}
start
trap '' INT TERM HUP
while read -r signal; do
	kill -s "$signal" "$server"
	wait "$server"
	start
done
kill -QUIT "$server" 2>/dev/null
wait "$server"
rm -rf "$dir/data" "$dir"/.s.* "$dir/initdb.log"
