package cryptohook

import (
	"context"
	"fmt"
	"iter"
	"strconv"
	"strings"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// Statements about many rows at once.

// insertSizes are how many rows a statement inserts: as few different numbers as will do, for a connection keeps every statement prepared.
var insertSizes = [...]int{100, 20, 4, 1}

// insertAll inserts rows, the earlier ones first, with few statements. Rows with the same key go into different statements: PostgreSQL's do
// not touch a row twice, and none sees what it has inserted itself.
func insertAll[Row dbutil.MassInsertable[Values], Values dbutil.Array, Key comparable](
	ctx context.Context, db *dbutil.Database, insert *dbutil.MassInsertBuilder[Row, [0]any, Values], rows []Row, key func(Row) Key,
) error {
	for some := range perInsert(rows, key) {
		query, params := insert.Build([0]any{}, some)
		if _, err := db.Exec(ctx, query, params...); err != nil {
			return fmt.Errorf("failed to store %d rows at once: %w", len(some), err)
		}
	}
	return nil
}

// perInsert gives rows in pieces of the sizes of statements, in none of which a key is twice.
func perInsert[Row any, Key comparable](rows []Row, key func(Row) Key) iter.Seq[[]Row] {
	return func(yield func([]Row) bool) {
		for piece := range apart(rows, insertSizes[0], key) {
			for _, size := range insertSizes {
				for ; len(piece) >= size; piece = piece[size:] {
					if !yield(piece[:size]) {
						return
					}
				}
			}
		}
	}
}

// apart gives values in their order, in pieces of so many at most, in none of which a key is twice.
func apart[V any, Key comparable](values []V, most int, key func(V) Key) iter.Seq[[]V] {
	return func(yield func([]V) bool) {
		begin, seen := 0, make(map[Key]struct{}, min(len(values), most))
		for i, value := range values {
			k := key(value)
			if _, again := seen[k]; again || i-begin == most {
				if !yield(values[begin:i]) {
					return
				}
				begin = i
				clear(seen)
			}
			seen[k] = struct{}{}
		}
		if begin < len(values) {
			yield(values[begin:])
		}
	}
}

// stored gives a text as the database gives it back: two that are the same there are one row.
func stored[Text ~string](db *dbutil.Database, text Text) Text {
	if db.Dialect == dbutil.Postgres {
		return Text(withoutNUL(string(text)))
	}
	return text
}

// storedDevice names a device as it is stored.
type storedDevice struct {
	userID   id.UserID
	deviceID id.DeviceID
}

func (s *store) storedDevice(userID id.UserID, deviceID id.DeviceID) storedDevice {
	return storedDevice{stored(s.Database, userID), stored(s.Database, deviceID)}
}

// execAll runs a statement whose only parameter stands for many values, perStatement at most.
func execAll[V any](ctx context.Context, s *store, query string, values []V) error {
	query, params := withMany(query, values)
	_, err := s.Exec(ctx, query, params...)
	return err
}

// withMany puts as many parameters into a statement as there are values, in place of $1.
func withMany[V any](query string, values []V) (string, []any) {
	list, params := parameters(nil, values)
	return strings.Replace(query, "$1", list, 1), params
}

// withTwo is withMany with a second list in place of $2, which comes later in the statement.
func withTwo[V, W any](query string, first []V, second []W) (string, []any) {
	before, after, _ := strings.Cut(query, "$2")
	before, params := withMany(before, first)
	list, params := parameters(params, second)
	return before + list + after, params
}

// parameters adds the values to those before them, and gives how a statement names them.
func parameters[V any](params []any, values []V) (list string, all []any) {
	placeholders := make([]string, len(values))
	for i, value := range values {
		params = append(params, value)
		placeholders[i] = "$" + strconv.Itoa(len(params))
	}
	return strings.Join(placeholders, ", "), params
}
